-- Writes an event down. KEYS[1]: the shard of its name. ARGV: name, event id, kind (h: it happened, w: a withdrawal), when, 1 where
-- there is no room. Answers what is known of it: see `:event`; nothing where there is no room.
local call = redis.call
local event = ARGV[1] .. '\0' .. ARGV[2]
local known = call('HGET', KEYS[1] .. ':event', event)
if known then return known end
if ARGV[5] == '1' then return false end
known = ARGV[4] .. ' ' .. ARGV[3]
if ARGV[3] == 'h' then
  local newest = call('HGET', KEYS[1] .. ':recent', ARGV[1])
  if not newest or tonumber(string.match(newest, '^%d+')) <= tonumber(ARGV[4]) then
    call('HSET', KEYS[1] .. ':recent', ARGV[1], ARGV[4] .. ' ' .. ARGV[2])
  end
end
call('ZADD', KEYS[1] .. ':open', ARGV[4], event)
call('HSET', KEYS[1] .. ':event', event, known)
return known
