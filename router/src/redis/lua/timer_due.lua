-- What is due. KEYS as for setting a timer. ARGV: how many.
-- Answers the milliseconds until the next one that is not (-1: none), then timer, epoch and time of each that is.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local later = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local answer = { later[2] and later[2] - now or -1 }
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
for i = 1, #due, 2 do
  table.insert(answer, { due[i], redis.call('HGET', KEYS[2], due[i]) or '0', due[i + 1] })
end
return answer
