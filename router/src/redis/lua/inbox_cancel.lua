-- Ends a push that waits. ARGV: 3 message id.
-- Answers {what ended, 1 if nothing waits any more and the client is listed, receipt or nothing}.
local n, now, ended = load(), now_ms(), {}
local value = call('HGET', MESSAGE, ARGV[3])
local known = value and cmsgpack.unpack(value) or {}
local e = #known == 2 and entry(known[2])
if e then
  finish(n, e, is_over(n, e, now) and 'x' or 'c', '', now, ended)
  save(n)
end
return { ended, n.c == 0 and n.w or 0, receipt(n, ARGV[3], now) or {} }
