-- Makes somebody a member of a group. KEYS[1]: the lives of all groups; KEYS[2]: the group's members;
-- KEYS[3]: lives that ended, by life. ARGV: filter, member,
-- a life to go on with where none is known (may be empty). Answers the life, and 1 where it begins, or begins again, here.
local life = redis.call('HGET', KEYS[1], ARGV[1])
local is_new = 0
if not life and ARGV[3] ~= '' then
  is_new = 1
  life = ARGV[3]
  redis.call('HSET', KEYS[1], ARGV[1], life)
  redis.call('HDEL', KEYS[3], life)
end
if not life then
  is_new = 1
  local time = redis.call('TIME')
  life = string.format('%.0f', time[1] * 1000000 + time[2])
  redis.call('HSET', KEYS[1], ARGV[1], life)
end
redis.call('SADD', KEYS[2], ARGV[2])
return { life, is_new }
