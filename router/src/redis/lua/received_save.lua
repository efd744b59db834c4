-- KEYS[1]: route; KEYS[2]: received packet identifiers. ARGV: epoch, packet identifier, record, and for a note that the
-- message went on the record before it (else nothing). Refused from when a newer connection has written the session: that one
-- reads these records afterwards. Of what it has read a displaced connection may still note that the message went on, as long as
-- the record is about the same message.
local owned = redis.call('HGET', KEYS[1], 'owned')
if owned and tonumber(owned) > tonumber(ARGV[1]) then
  local before = redis.call('HGET', KEYS[2], ARGV[2])
  if not before or before ~= ARGV[4] then
    return redis.error_reply('STALE ' .. owned)
  end
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
