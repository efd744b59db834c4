-- Events that are not driven to the end. KEYS[1]: the shard of their names. ARGV: before when, how many.
-- Answers each and what is known of it.
local call = redis.call
local found = {}
for _, event in ipairs(call('ZRANGEBYSCORE', KEYS[1] .. ':open', '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])) do
  local known = call('HGET', KEYS[1] .. ':event', event)
  if known then
    found[#found + 1] = event
    found[#found + 1] = known
  else
    call('ZREM', KEYS[1] .. ':open', event)
  end
end
return found
