-- Compares one connection with the store, and writes a route again that was lost. KEYS[1]: route. ARGV: node, epoch.
-- 'owned', 'restored', or the newer epoch.
local route = redis.call('HMGET', KEYS[1], 'node', 'last')
local last, epoch = tonumber(route[2] or 0), tonumber(ARGV[2])
if last > epoch then
  return route[2]
end
if route[1] and last == epoch then
  return 'owned'
end
local time = redis.call('TIME')
local at = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('HSET', KEYS[1], 'node', ARGV[1], 'epoch', ARGV[2], 'last', ARGV[2], 'at', at)
redis.call('PERSIST', KEYS[1])
return 'restored'
