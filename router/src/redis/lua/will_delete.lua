-- Forgets the will of one connection. KEYS[1]: will. ARGV: epoch. 1 if it was there.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
