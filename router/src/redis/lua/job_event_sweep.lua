-- Forgets events. KEYS[1]: the shard of their names. ARGV: those that came before when, how many. Answers how many.
local call = redis.call
local events = call('ZRANGEBYSCORE', KEYS[1] .. ':events', '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])
for _, event in ipairs(events) do
  local name, id = string.match(event, '^(%Z+)%z(.+)$')
  local newest = call('HGET', KEYS[1] .. ':recent', name)
  if newest and string.match(newest, '^%d+ (.+)$') == id then call('HDEL', KEYS[1] .. ':recent', name) end
  call('HDEL', KEYS[1] .. ':event', event)
  call('ZREM', KEYS[1] .. ':events', event)
end
return #events
