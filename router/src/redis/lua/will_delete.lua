-- Forgets the will of one connection, also for whoever is to publish it. KEYS[1]: will; KEYS[2]: the turns to publish it, see will_take.lua.
-- ARGV: epoch. 1 if it was there.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then
  redis.call('HSET', KEYS[2], ARGV[1], '')
end
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
