-- Replaces or removes a retained message. KEYS[1]: records by topic; KEYS[2]: topics by their last change;
-- KEYS[3]: removed topics by their last change; KEYS[4]: generation, number of changes, number of the last one forgotten, a clock in
-- microseconds that never goes back. KEYS[5]: topics by the time at which their message expires. KEYS[6]: when each topic was last
-- asked to be changed. ARGV: topic, record (nothing: removed), how many removed topics are remembered, when the message expires
-- (nothing: never), when this was asked for by that clock (nothing: now).
-- Changes nothing where something was stored that was asked for later. Answers the time by that clock.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('HSETNX', KEYS[4], 'generation', string.format('%.0f', now))
now = math.max(now, tonumber(redis.call('HGET', KEYS[4], 'clock') or 0))
-- What was asked for earlier and comes late counts from then; nothing counts from later than now.
local asked = math.min(now, tonumber(ARGV[5]) or now)
if asked < tonumber(redis.call('HGET', KEYS[6], ARGV[1]) or 0) then
  return now
end
if ARGV[2] == '' and redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then
  return now
end
redis.call('HSET', KEYS[4], 'clock', string.format('%.0f', now))
redis.call('HSET', KEYS[6], ARGV[1], string.format('%.0f', asked))
if ARGV[4] ~= '' then
  redis.call('ZADD', KEYS[5], ARGV[4], ARGV[1])
else
  redis.call('ZREM', KEYS[5], ARGV[1])
end
local change = redis.call('HINCRBY', KEYS[4], 'change', 1)
redis.call('ZADD', KEYS[2], change, ARGV[1])
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
  return now
end
redis.call('ZADD', KEYS[3], change, ARGV[1])
if redis.call('ZCARD', KEYS[3]) > tonumber(ARGV[3]) then
  local oldest = redis.call('ZPOPMIN', KEYS[3])
  redis.call('ZREM', KEYS[2], oldest[1])
  redis.call('HDEL', KEYS[6], oldest[1])
  redis.call('HSET', KEYS[4], 'forgotten', oldest[2])
end
return now
