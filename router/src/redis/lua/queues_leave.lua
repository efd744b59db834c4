-- Takes a member out of a group; the last one ends its life. KEYS[1]: the lives of all groups; KEYS[2]: the group's members;
-- KEYS[3]: lives that ended, by life. ARGV: filter, member.
redis.call('SREM', KEYS[2], ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 1 then
  return 0
end
local life = redis.call('HGET', KEYS[1], ARGV[1])
if life then
  redis.call('HSET', KEYS[3], life, ARGV[1])
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 1
