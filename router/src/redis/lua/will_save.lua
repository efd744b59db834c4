-- Keeps a will unless there is one of a newer connection. KEYS[1]: will. ARGV: epoch, record.
if tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0) > tonumber(ARGV[1]) then
  return 0
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'record', ARGV[2])
return 1
