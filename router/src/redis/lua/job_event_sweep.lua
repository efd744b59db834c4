-- Forgets events. ARGV: those that came before when, how many. Answers how many.
local events = call('ZRANGEBYSCORE', EVENTS, '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])
for _, event in ipairs(events) do
  local name, id = string.match(event, '^(%Z+)%z(.+)$')
  local newest = call('HGET', RECENT, name)
  if newest and string.match(newest, '^%d+ (.+)$') == id then call('HDEL', RECENT, name) end
  call('HDEL', EVENT, event)
  call('ZREM', EVENTS, event)
end
return #events
