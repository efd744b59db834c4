-- An event has been driven to the end. KEYS[1]: the shard of its name. ARGV: name, event id, what it came to, when it came.
-- Answers what it came to: for whoever was first.
local call = redis.call
local event = ARGV[1] .. '\0' .. ARGV[2]
local known = call('HGET', KEYS[1] .. ':event', event)
if not known then return ARGV[3] end
local came_to = string.match(known, '^%d+ %a (.+)$')
if not came_to then
  came_to = ARGV[3]
  call('ZADD', KEYS[1] .. ':events', ARGV[4], event)
  call('HSET', KEYS[1] .. ':event', event, known .. ' ' .. came_to)
end
call('ZREM', KEYS[1] .. ':open', event)
return came_to
