-- KEYS[1]: route; KEYS[2]: received packet identifiers. ARGV: epoch, packet identifier, record, and for a note that the
-- message went on the record before it (else nothing). A displaced connection sees its last packets through after the claim of
-- the newer one, which loads them then: such a note is taken as long as it is about the same message.
local last = redis.call('HGET', KEYS[1], 'last')
if last and tonumber(last) > tonumber(ARGV[1]) then
  local before = redis.call('HGET', KEYS[2], ARGV[2])
  if not before or before ~= ARGV[4] then
    return redis.error_reply('STALE ' .. last)
  end
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
