-- Sets a timer unless a newer connection has set it. KEYS[1]: timers by time; KEYS[2]: the epoch of each.
-- ARGV: timer, epoch, milliseconds from now.
if tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0) > tonumber(ARGV[2]) then
  return 0
end
local time = redis.call('TIME')
local at = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3])
redis.call('ZADD', KEYS[1], string.format('%.0f', at), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
