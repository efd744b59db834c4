-- Appends one message and says where its client is.
-- KEYS[2]: the route. ARGV: 3 message id, 4 fingerprint or '', 5 bytes, 6 accepted, 7 expires or 0, 8 origin, 9 qos,
-- 10 message, 11 and 12 entries and bytes that an inbox may hold, 13 what happens at the limit: o (the oldest go),
-- n (the new one goes), r (refused).
-- Answers {'stored' or 'repeated' or 'dropped' or 'full', what else ended, position, 1 if it is the first to wait,
-- 1 if the inbox has become full, route} or {'repeated', {}, receipt}.
local id, fingerprint, bytes, accepted, expires = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local origin, qos, message = tonumber(ARGV[8]), ARGV[9], ARGV[10]
local entries_max, bytes_max, policy = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local n, us, ended, told = load(), now_us(), {}, 0
local now = math.floor(us / 1000)

if fingerprint ~= '' then
  local known = receipt(n, id, now)
  if known then return { 'repeated', {}, known } end
end
if bytes > bytes_max or entries_max < 1 then return { 'full', {} } end

local function is_full() return n.c >= entries_max or n.b + bytes > bytes_max end
if is_full() then sweep(n, now, ended) end
if is_full() then
  told, n.f = 1 - n.f, 1
  -- Each goes once, however many have to make room for one that is large.
  while policy == 'o' and is_full() and n.c > 0 do
    finish(n, parse(call('XRANGE', ENTRIES, '-', '+', 'COUNT', 1)[1]), 'o', '', now, ended)
  end
  if is_full() then
    if policy == 'n' and origin == 0 then
      forget(n, id)
      keep_final(n, id, { fingerprint, accepted, '', '', '', 'o', int(math.max(now, tonumber(accepted))), '' }, now)
    end
    save(n)
    return { policy == 'n' and 'dropped' or 'full', ended, '', 0, told }
  end
end

local first = n.c == 0 and 1 or 0
if first == 1 then
  n.g, n.t, n.touched = math.max(n.g + 1, us), 1, true
else
  -- Another run of the server may know less than was told of (a failover): what it gives out must not have been given out
  -- before. The sequence goes on, because a generation that begins with 1 says that nothing lies before it.
  n.t = n.t + 1
end
local run = string.match(call('INFO', 'replication'), 'master_replid:(%w+)') or ''
if first == 0 and n.v ~= run then n.g = math.max(n.g + 1, us) end
n.v = run

local position = int(n.g) .. '-' .. int(n.t)
local head = table.concat({ ARGV[5], accepted, ARGV[7], ARGV[8], qos, id }, ' ')
if origin == 0 then
  forget(n, id)
  call('HSET', MESSAGE, id, cmsgpack.pack({ fingerprint, position }))
end
if expires > 0 then
  call('ZADD', EXPIRY, ARGV[7], position)
  n.touched = n.touched or call('ZCARD', EXPIRY) == 1
  n.mx = math.max(n.mx, now)
end
count(n, { bytes = bytes, origin = origin, expires = expires }, 1)
save(n, position, head, message)
return { 'stored', ended, position, first, told, call('HMGET', KEYS[2], 'node', 'last', 'at') }
