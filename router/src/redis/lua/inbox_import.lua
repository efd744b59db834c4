-- Takes an entry over as it stood in another store, at its position.
-- ARGV: 3 message id, 4 fingerprint or '', 5 bytes, 6 accepted, 7 expires or 0, 8 origin, 9 qos, 10 message, 11 position,
-- 12 and 13: 1 if it may have been sent, if PUBREC came.
-- Answers 1, or 0 where it has been taken over before.
local id, expires, origin, position = ARGV[3], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[11]
local n = load()
if n.c > 0 and up_to(position, int(n.g) .. '-' .. int(n.t)) then return 0 end
n.touched = true
n.g, n.t = parts(position)
if ARGV[12] == '1' then n.st = position end
if ARGV[13] == '1' then call('SADD', RECEIVED, position) end
if origin == 0 then
  forget(n, id)
  call('HSET', MESSAGE, id, cmsgpack.pack({ ARGV[4], position }))
end
if expires > 0 then
  call('ZADD', EXPIRY, ARGV[7], position)
  n.mx = math.max(n.mx, now_ms())
end
count(n, { bytes = tonumber(ARGV[5]), origin = origin, expires = expires }, 1)
save(n, position, table.concat({ ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9], id }, ' '), ARGV[10])
return 1
