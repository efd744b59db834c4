-- Ends entries of the session but those of shared subscriptions, and forgets which pushes were received, a part at a time.
-- KEYS[2]: the route. ARGV: 3 after which position, 4 up to which one, '' for the last of now; 5 the last epoch that the
-- session had, or ''.
-- Answers {what ended, 1 if nothing waits any more and the client is listed, shared entries found, after which position to
-- go on or '', up to which one} or {the newer epoch that the client has}.
local COUNT = 64
local newest = call('HGET', KEYS[2], 'last')
if newest and ARGV[5] ~= '' and tonumber(newest) > tonumber(ARGV[5]) then return { newest } end
local n, now, ended = load(), now_ms(), {}
local received = call('EXISTS', RECEIVED) == 1
if n.c == 0 or (n.o == 0 and not received) then return { ended, 0, 0, '', '' } end
local last = ARGV[4]
if last == '' then last = int(n.g) .. '-' .. int(n.t) end
local part = call('XRANGE', ENTRIES, '(' .. ARGV[3], last, 'COUNT', COUNT)
local shared, looked_to = 0, ''
for _, raw in ipairs(part) do
  local e = parse(raw)
  looked_to = e.position
  if e.origin == 1 then
    finish(n, e, 's', '', now, ended)
  elseif e.origin == 2 then
    shared = shared + 1
  elseif received then
    call('SREM', RECEIVED, e.position)
  end
end
if #part < COUNT then looked_to = '' end
if #ended > 0 then save(n) end
return { ended, n.c == 0 and n.w or 0, shared, looked_to, last }
