-- A page of changes. KEYS as for setting one. ARGV: generation and change after which, how many.
-- Answers generation, the number of all changes, 1 where it begins anew, the time by the clock of changes, then topic, number and record (nil: removed) in turn.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('HSETNX', KEYS[4], 'generation', string.format('%.0f', now))
local state = redis.call('HMGET', KEYS[4], 'generation', 'change', 'forgotten', 'clock')
local all, after = tonumber(state[2] or 0), tonumber(ARGV[2])
local anew = 0
if state[1] ~= ARGV[1] or after > all or after < tonumber(state[3] or 0) then
  anew, after = 1, 0
end
local answer = { state[1], all, anew, string.format('%.0f', math.max(now, tonumber(state[4] or 0))) }
local low = '(' .. string.format('%.0f', after)
local page = redis.call('ZRANGEBYSCORE', KEYS[2], low, '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[3])
for i = 1, #page, 2 do
  table.insert(answer, page[i])
  table.insert(answer, page[i + 1])
  table.insert(answer, redis.call('HGET', KEYS[1], page[i]))
end
return answer
