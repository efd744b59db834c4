-- Writes an event down. ARGV: name, event id, kind (h: it happened, w: a withdrawal), when, 1 where there is no room.
-- Answers what is known of it (see `event`); nothing where there is no room.
local event = ARGV[1] .. '\0' .. ARGV[2]
local known = call('HGET', EVENT, event)
if known then return known end
if ARGV[5] == '1' then return false end
known = ARGV[4] .. ' ' .. ARGV[3] .. next_place()
if ARGV[3] == 'h' then
  local newest = call('HGET', RECENT, ARGV[1])
  if not newest or tonumber(string.match(newest, '^%d+')) <= tonumber(ARGV[4]) then
    call('HSET', RECENT, ARGV[1], ARGV[4] .. ' ' .. ARGV[2])
  end
end
call('ZADD', OPEN, ARGV[4], event)
call('HSET', EVENT, event, known)
return known
