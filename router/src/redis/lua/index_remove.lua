-- Removes a client from an index of its shard, unless a newer connection is noted. KEYS as for putting it there.
-- ARGV: client, epoch (nothing: whichever), for how many seconds it must not have been noted.
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known then
  return 0
end
local before, at, group = string.match(known, '^(%d+) (%d+) (.*)$')
if ARGV[2] ~= '' and tonumber(before) > tonumber(ARGV[2]) then
  return 0
end
if redis.call('TIME')[1] - at < tonumber(ARGV[3]) then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], group .. '\0' .. ARGV[1])
return 1
