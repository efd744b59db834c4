-- Removes a timer unless a newer connection has set it. KEYS as for setting it. ARGV: timer, epoch.
local known = redis.call('HGET', KEYS[2], ARGV[1])
if not known or tonumber(known) > tonumber(ARGV[2]) then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
