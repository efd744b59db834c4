-- Notes that entries up to a position were handed to a connection. ARGV: 3 position, 4 epoch, 5 node.
local position, epoch, node = ARGV[3], ARGV[4], ARGV[5]
local n = load()
if n.c == 0 or up_to(position, n.st) then return 0 end
n.st = position
-- What was sent there may be unknown here after a failover: its position, and with it its packet identifier, is never
-- another message's.
if not up_to(position, int(n.g) .. '-' .. int(n.t)) then n.g, n.t = parts(position) end
local notes = {}
for note in string.gmatch(n.s, '[^\n]*\n') do notes[#notes + 1] = note end
notes[#notes + 1] = position .. ' ' .. int(now_ms()) .. ' ' .. epoch .. ' ' .. node .. '\n'
n.s = table.concat(notes, '', math.max(1, #notes - NOTES_MAX + 1))
save(n)
return 1
