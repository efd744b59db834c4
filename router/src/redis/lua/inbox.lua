-- What the functions of inboxes have in common; it stands before each of them.
--
-- KEYS[1] is the stream of a client's entries; what else there is about its inbox hangs on the same name, and so is in the
-- same slot. ARGV[1]: how long final receipts are kept, in ms. ARGV[2]: how many bytes of them.
--
--   stream    'generation-sequence' -> h: 'bytes accepted expires origin qos id', m: the message
--   :meta     hash, see `load`
--   :expiry   sorted set, position by when it expires
--   :received set, positions whose PUBREC came
--   :message  hash, message id -> where it waits {fingerprint, position}, or its final receipt (see `finish`)
--   :final    sorted set, message id by when it ended
--
-- Origins: 0 push, 1 session, 2 session by a shared subscription. How an entry ends: d delivered, r rejected, x expired,
-- p replaced, o overflow, l too large, s session ended, c cancelled.

local call = redis.call
local ENTRIES, META = KEYS[1], KEYS[1] .. ':meta'
local EXPIRY, RECEIVED = KEYS[1] .. ':expiry', KEYS[1] .. ':received'
local MESSAGE, FINAL = KEYS[1] .. ':message', KEYS[1] .. ':final'
local RETENTION, RECEIPTS_MAX = tonumber(ARGV[1]), tonumber(ARGV[2])
-- Nothing that is due is looked for beyond this in one call: the next goes on.
local SWEEP_MAX, TRIM_MAX, NOTES_MAX = 64, 16, 16
-- An inbox that nobody came for goes a week after the last of it expired; the number of its last generation stays an hour
-- after it was emptied, so that a clock that is set back a little does not bring it again.
local ABANDONED, REMEMBERED, HOUR = 604800000, 3600000, 3600000

local function int(number) return string.format('%.0f', number) end

local function now_us()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

local function now_ms() return math.floor(now_us() / 1000) end

local function parts(position)
  local generation, sequence = string.match(position, '^(%d+)-(%d+)$')
  return tonumber(generation), tonumber(sequence)
end

-- Whether position `a` is at or before `b`.
local function up_to(a, b)
  local a_generation, a_sequence = parts(a)
  local b_generation, b_sequence = parts(b)
  return a_generation < b_generation or (a_generation == b_generation and a_sequence <= b_sequence)
end

local function parse(raw)
  local bytes, accepted, expires, origin, qos, id = string.match(raw[2][2], '^(%d+) (%d+) (%d+) (%d) (%d) (.+)$')
  return {
    position = raw[1], bytes = tonumber(bytes), accepted = accepted, expires = tonumber(expires),
    origin = tonumber(origin), qos = tonumber(qos), id = id, message = raw[2][4],
  }
end

-- Counts an entry in (1) or out (-1).
local function count(n, e, by)
  n.c, n.b = n.c + by, n.b + by * e.bytes
  if e.origin > 0 then n.o = n.o + by end
  if e.origin > 0 or e.expires == 0 then n.k = n.k + by end
  n.mx = math.max(n.mx, e.expires)
end

-- g, t: generation and sequence of the last position given out. c, b: entries and their bytes. o: how many of them are of
-- the session, k: how many keep the inbox from being abandoned (of the session, or never expiring). mx: when the last of
-- the others expires; d: when Redis forgets the inbox. st: up to where it was sent; s: by whom, oldest first. rb: bytes of
-- final receipts. w: listed among the waiting. f: it has been told that it is full. v: which run of the server wrote last.
local function load()
  local v = call('HMGET', META, 'g', 't', 'c', 'b', 'o', 'k', 'mx', 'd', 'rb', 'w', 'f', 'st', 's', 'v')
  local n = {
    g = tonumber(v[1]) or 0, t = tonumber(v[2]) or 0, c = tonumber(v[3]) or 0, b = tonumber(v[4]) or 0,
    o = tonumber(v[5]) or 0, k = tonumber(v[6]) or 0, mx = tonumber(v[7]) or 0, d = tonumber(v[8]) or 0,
    rb = tonumber(v[9]) or 0, w = tonumber(v[10]) or 0, f = tonumber(v[11]) or 0,
    st = v[12] or '0-0', s = v[13] or '', v = v[14] or '',
  }
  -- A server that is killed while it writes its log may bring half a transaction back, two starts later.
  if n.c ~= call('XLEN', ENTRIES) then
    n.c, n.b, n.o, n.k = 0, 0, 0, 0
    for _, raw in ipairs(call('XRANGE', ENTRIES, '-', '+')) do
      count(n, parse(raw), 1)
      if not up_to(raw[1], int(n.g) .. '-' .. int(n.t)) then n.g, n.t = parts(raw[1]) end
    end
  end
  n.touched = n.c == 0
  return n
end

-- Writes `n` down, and the entry that it counts already and that is new, if there is one: that last, so that half of it
-- is not a message.
local function save(n, position, head, message)
  if n.c == 0 then
    call('DEL', ENTRIES, META, EXPIRY, RECEIVED)
    if n.g > 0 then
      call('HSET', META, 'g', int(n.g), 'rb', int(n.rb))
      call('PEXPIRE', META, math.max(REMEMBERED, RETENTION))
      call('PEXPIRE', MESSAGE, RETENTION)
      call('PEXPIRE', FINAL, RETENTION)
    end
    return
  end
  local deadline = 0
  if n.k == 0 and n.mx > 0 then deadline = math.ceil((n.mx + math.max(ABANDONED, RETENTION)) / HOUR) * HOUR end
  n.touched, n.had_deadline, n.d = n.touched or deadline ~= n.d, n.d > 0, deadline
  call('HSET', META, 'g', int(n.g), 't', n.t, 'c', n.c, 'b', int(n.b), 'o', n.o, 'k', n.k, 'mx', int(n.mx),
    'd', int(n.d), 'rb', int(n.rb), 'w', n.w, 'f', n.f, 'st', n.st, 's', n.s, 'v', n.v)
  if position then call('XADD', ENTRIES, position, 'h', head, 'm', message) end
  if not n.touched then return end
  if deadline > 0 then
    for _, key in ipairs({ ENTRIES, META, EXPIRY, RECEIVED, MESSAGE, FINAL }) do call('PEXPIREAT', key, int(deadline)) end
  else
    for _, key in ipairs(n.had_deadline and { ENTRIES, META, EXPIRY, RECEIVED, MESSAGE, FINAL } or { META, MESSAGE, FINAL }) do
      call('PERSIST', key)
    end
  end
end

local function entry(position)
  local found = call('XRANGE', ENTRIES, position, position)
  if found[1] then return parse(found[1]) end
end

local function is_received(e) return call('SISMEMBER', RECEIVED, e.position) == 1 end

-- Whether `e` is past its time. A message whose delivery has begun is seen through ([MQTT-3.3.2-5], [MQTT-4.3.3-7]); a push
-- may have been sent to a session that has ended since, so that only the device's PUBREC is beyond doubt.
local function is_over(n, e, now)
  if e.expires == 0 or e.expires > now then return false end
  return not (e.origin > 0 and up_to(e.position, n.st)) and not is_received(e)
end

-- When, under which epoch and by which node a position was sent first, as far as that is still known.
local function note_of(n, position)
  for through, at, epoch, node in string.gmatch(n.s, '(%S+) (%d+) (%d+) ([^\n]*)\n') do
    if up_to(position, through) then return at, epoch, node end
  end
end

-- {fingerprint, accepted, sent at, epoch, node, how it ended, when, reason code}; '' for what there is not.
local function receipt_of(n, e, fingerprint)
  local receipt = { fingerprint, e.accepted, '', '', '', '', '', '' }
  if up_to(e.position, n.st) then
    local at, epoch, node = note_of(n, e.position)
    receipt[3], receipt[4], receipt[5] = at or e.accepted, epoch or '', node or ''
  end
  return receipt
end

-- Forgets a final receipt.
local function forget(n, id)
  local value = call('HGET', MESSAGE, id)
  if value and #cmsgpack.unpack(value) == 8 then
    call('HDEL', MESSAGE, id)
    n.rb = math.max(0, n.rb - #value - 2 * #id)
  end
  call('ZREM', FINAL, id)
end

local function keep_final(n, id, receipt, now)
  local value = cmsgpack.pack(receipt)
  n.rb = n.rb + #value + 2 * #id
  call('HSET', MESSAGE, id, value)
  n.touched = call('ZADD', FINAL, int(now), id) == 1 or n.touched
  for _, old in ipairs(call('ZRANGEBYSCORE', FINAL, '-inf', int(now - RETENTION - 1), 'LIMIT', 0, TRIM_MAX)) do
    forget(n, old)
  end
  for _ = 1, TRIM_MAX do
    if n.rb <= RECEIPTS_MAX then break end
    local old = call('ZRANGE', FINAL, 0, 0)[1]
    if not old then n.rb = 0 break end
    forget(n, old)
  end
end

-- Ends `e`; `ended` collects how, and which push it was ('' for an entry of the session).
local function finish(n, e, how, code, now, ended)
  local last = nil
  if e.origin == 0 then
    local known = call('HGET', MESSAGE, e.id)
    last = receipt_of(n, e, known and cmsgpack.unpack(known)[1] or '')
    last[6], last[7], last[8] = how, int(math.max(now, tonumber(e.accepted))), code
  end
  call('XDEL', ENTRIES, e.position)
  if e.expires > 0 then call('ZREM', EXPIRY, e.position) end
  if e.qos == 2 then call('SREM', RECEIVED, e.position) end
  if e.origin == 2 then call('HDEL', META, 'claim:' .. e.position) end
  count(n, e, -1)
  if n.c == 0 then n.b, n.o, n.k, n.mx, n.st, n.s, n.f = 0, 0, 0, 0, '0-0', '', 0 end
  if last then keep_final(n, e.id, last, now) end
  ended[#ended + 1] = how
  ended[#ended + 1] = last and e.id or ''
end

-- Ends what is past its time. What may not end yet is looked at again in a minute.
local function sweep(n, now, ended)
  if n.c == 0 then return end
  for _, position in ipairs(call('ZRANGEBYSCORE', EXPIRY, '-inf', int(now), 'LIMIT', 0, SWEEP_MAX)) do
    local e = entry(position)
    if not e then
      call('ZREM', EXPIRY, position)
    elseif is_over(n, e, now) then
      finish(n, e, 'x', '', now, ended)
    else
      call('ZADD', EXPIRY, int(now + 60000), position)
    end
  end
end

-- The receipt of a push, or nil where nothing is known of it.
local function receipt(n, id, now)
  local value = call('HGET', MESSAGE, id)
  if not value then return nil end
  local known = cmsgpack.unpack(value)
  if #known == 8 then
    if tonumber(known[7]) + RETENTION < now then return nil end
    return known
  end
  local e = entry(known[2])
  if not e then return nil end
  local waiting = receipt_of(n, e, known[1])
  if e.expires > 0 and e.expires <= now then waiting[6], waiting[7] = 'x', int(e.expires) end
  return waiting
end
