-- Registers a job under an event name. ARGV: name, 'job id\0', what the event does and token.
-- Answers the clock of the server, and 'at event-id' of the newest event of that name, if there is one.
local member = ARGV[1] .. '\0' .. ARGV[2]
-- It may be registered already, by a call whose answer was lost: '/' is the byte behind '.'.
if #call('ZRANGEBYLEX', NAMES, '[' .. member .. '.', '(' .. member .. '/', 'LIMIT', 0, 1) == 0 then
  call('ZADD', NAMES, 0, member .. '.' .. next_place())
end
local time = call('TIME')
return { string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), call('HGET', RECENT, ARGV[1]) }
