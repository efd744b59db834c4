-- A part of an inbox. ARGV: 3 after which position, 4 at most so many entries, 5 and about so many bytes.
-- Answers {what ended, the last position given out or '', 1 if more follows, up to where it was looked, entries}, each
-- entry {position, 1 if it may have been sent, 1 if PUBREC came, message}.
local after, limit, bytes_max = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local n, now, ended = load(), now_ms(), {}
if n.c > 0 then
  sweep(n, now, ended)
  if #ended > 0 then save(n) end
end
if n.c == 0 then return { ended, '', 0, after, {} } end

local CHUNK, LOOKED_AT_MAX = 16, 512
local any_received = call('EXISTS', RECEIVED) == 1
local page, bytes, looked_at, last, more = {}, 0, 0, after, 0
while more == 0 do
  local chunk = call('XRANGE', ENTRIES, '(' .. last, '+', 'COUNT', CHUNK)
  for _, raw in ipairs(chunk) do
    if #page >= limit or (bytes >= bytes_max and #page > 0) or looked_at >= LOOKED_AT_MAX then more = 1 break end
    local e = parse(raw)
    looked_at, last = looked_at + 1, e.position
    if not is_over(n, e, now) then
      local received = any_received and is_received(e)
      page[#page + 1] = { e.position, up_to(e.position, n.st) and 1 or 0, received and 1 or 0, e.message }
      bytes = bytes + #e.message
    end
  end
  if #chunk < CHUNK then break end
end
return { ended, int(n.g) .. '-' .. int(n.t), more, last, page }
