-- How full an inbox is. Answers {what ended, 1 if nothing waits any more and the client is listed, entries, bytes}.
local n, ended = load(), {}
sweep(n, now_ms(), ended)
if #ended > 0 then save(n) end
return { ended, n.c == 0 and n.w or 0, n.c, n.b }
