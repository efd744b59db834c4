-- Notes a client in an index of its shard, unless a newer connection is noted. KEYS[1]: what is noted of each client;
-- KEYS[2]: groups and clients in order. ARGV: client, epoch (nothing: that of before), group.
local known = redis.call('HGET', KEYS[1], ARGV[1])
local epoch = tonumber(ARGV[2])
if known then
  local before, group = string.match(known, '^(%d+) %d+ (.*)$')
  before = tonumber(before)
  if epoch and before > epoch then
    return 0
  end
  epoch = epoch or before
  if group ~= ARGV[3] then
    redis.call('ZREM', KEYS[2], group .. '\0' .. ARGV[1])
  end
end
local note = string.format('%.0f ', epoch or 0) .. redis.call('TIME')[1] .. ' ' .. ARGV[3]
redis.call('HSET', KEYS[1], ARGV[1], note)
redis.call('ZADD', KEYS[2], 0, ARGV[3] .. '\0' .. ARGV[1])
return 1
