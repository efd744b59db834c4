-- An event has been driven to the end. ARGV: name, event id, what it came to, when it came.
-- Answers what it came to: for whoever was first.
local event = ARGV[1] .. '\0' .. ARGV[2]
local known = call('HGET', EVENT, event)
if not known then return ARGV[3] end
local came_to = string.match(known, '^%d+ %a%d* (.+)$')
if not came_to then
  came_to = ARGV[3]
  call('ZADD', EVENTS, ARGV[4], event)
  call('HSET', EVENT, event, known .. ' ' .. came_to)
end
call('ZREM', OPEN, event)
return came_to
