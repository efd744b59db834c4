-- Makes a node the owner of a client. KEYS[1]: route. ARGV: node, an epoch that is too low.
-- Answers the new epoch; then node, epoch and time of the route before, if there is one.
local time = redis.call('TIME')
local before = redis.call('HMGET', KEYS[1], 'node', 'last', 'at')
local epoch = time[1] * 1000000 + time[2]
epoch = math.max(epoch, tonumber(before[2] or 0) + 1, tonumber(ARGV[2]) + 1)
local text = string.format('%.0f', epoch)
local at = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('HSET', KEYS[1], 'node', ARGV[1], 'epoch', text, 'last', text, 'at', at)
redis.call('PERSIST', KEYS[1])
if before[1] then
  return { text, before[1], before[2], before[3] }
end
return { text }
