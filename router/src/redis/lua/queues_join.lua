-- Makes somebody a member of a group. KEYS[1]: the lives of all groups; KEYS[2]: the group's members. ARGV: filter, member.
-- Answers the life.
local life = redis.call('HGET', KEYS[1], ARGV[1])
if not life then
  local time = redis.call('TIME')
  life = string.format('%.0f', time[1] * 1000000 + time[2])
  redis.call('HSET', KEYS[1], ARGV[1], life)
end
redis.call('SADD', KEYS[2], ARGV[2])
return life
