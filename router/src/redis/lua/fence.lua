-- Before every script that a connection writes with. KEYS[1]: route; ARGV[1]: the connection's epoch (nothing: no fence).
local last = redis.call('HGET', KEYS[1], 'last')
if last and ARGV[1] ~= '' and tonumber(last) > tonumber(ARGV[1]) then
  return redis.error_reply('STALE ' .. last)
end

-- The session is this connection's from now on: what older ones note of packet identifiers is refused, see received_save.lua.
local function owned()
  if last and ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'owned') ~= ARGV[1] then
    redis.call('HSET', KEYS[1], 'owned', ARGV[1])
  end
end
