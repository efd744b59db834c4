-- Forgets dead letters of a message. KEYS: letters by id, their order, letters by message, bytes of all. ARGV: the message,
-- then letters. Answers how many there were.
local removed = 0
for at = 2, #ARGV do
  local bytes = redis.call('HSTRLEN', KEYS[1], ARGV[at])
  if redis.call('HDEL', KEYS[1], ARGV[at]) == 1 then
    removed = removed + 1
    redis.call('ZREM', KEYS[2], ARGV[at] .. ' ' .. ARGV[1])
    redis.call('ZREM', KEYS[3], ARGV[1] .. ' ' .. ARGV[at])
    redis.call('DECRBY', KEYS[4], bytes)
  end
end
return removed
