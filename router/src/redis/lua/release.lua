-- Removes the route of one connection; its epoch stays as a fence for some time. KEYS[1]: route.
-- ARGV: epoch, how long it stays in milliseconds. 1 if the route was there.
local route = redis.call('HMGET', KEYS[1], 'node', 'last')
if not route[1] or route[2] ~= ARGV[1] then
  return 0
end
redis.call('HDEL', KEYS[1], 'node', 'epoch', 'at')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
