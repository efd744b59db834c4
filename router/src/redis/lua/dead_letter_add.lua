-- Keeps a dead letter. KEYS: letters by id, their order, letters by message, bytes of all. ARGV: letter, message, record,
-- how many there may be, how many bytes. Answers 0 where there is no room.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return 1
end
local bytes = tonumber(redis.call('GET', KEYS[4]) or '0')
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) or bytes + #ARGV[3] > tonumber(ARGV[5]) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[1] .. ' ' .. ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[2] .. ' ' .. ARGV[1])
redis.call('INCRBY', KEYS[4], #ARGV[3])
return 1
