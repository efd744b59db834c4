-- Events that are not driven to the end. ARGV: before when, how many.
-- Answers each and what is known of it.
local found = {}
for _, event in ipairs(call('ZRANGEBYSCORE', OPEN, '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])) do
  local known = call('HGET', EVENT, event)
  if known then
    found[#found + 1] = event
    found[#found + 1] = known
  else
    call('ZREM', OPEN, event)
  end
end
return found
