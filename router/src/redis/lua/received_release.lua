-- Forgets a packet identifier that the device has released. KEYS[1]: route; KEYS[2]: received packet identifiers. ARGV: epoch, packet
-- identifier. Refused from when a newer connection has written the session: what stands there may be that one's.
local owned = redis.call('HGET', KEYS[1], 'owned')
if owned and tonumber(owned) > tonumber(ARGV[1]) then
  return redis.error_reply('STALE ' .. owned)
end
return redis.call('HDEL', KEYS[2], ARGV[2])
