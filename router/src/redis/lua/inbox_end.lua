-- Ends entries; unknown ones are ignored. ARGV: from 3 on position, how, reason code or '' of each.
-- Answers {what ended, 1 if nothing waits any more and the client is listed among the waiting}.
local n, now, ended = load(), now_ms(), {}
if n.c == 0 then return { ended, 0 } end
for i = 3, #ARGV, 3 do
  local e = entry(ARGV[i])
  -- A push outlives sessions.
  if e and (e.origin > 0 or ARGV[i + 1] ~= 's') then finish(n, e, ARGV[i + 1], ARGV[i + 2], now, ended) end
end
if #ended > 0 then save(n) end
return { ended, n.c == 0 and n.w or 0 }
