-- Removes messages whose time is over. KEYS[1]: records by topic; KEYS[2]: topics by their last change; KEYS[3]: topics by the time
-- at which their message expires; KEYS[4]: when each was asked to be changed. ARGV: how many at most. Answers how many. That is no change: every node sees the time for itself.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local over = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, topic in ipairs(over) do
  redis.call('HDEL', KEYS[1], topic)
  redis.call('ZREM', KEYS[2], topic)
  redis.call('ZREM', KEYS[3], topic)
  redis.call('HDEL', KEYS[4], topic)
end
return #over
