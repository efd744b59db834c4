-- Asks for the turn to publish a will. KEYS[1]: the turns of a client, by the epoch of the will: until when and whose; empty once the will is
-- gone. ARGV: epoch, who asks, how long the turn lasts and how long all this is remembered, in milliseconds.
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held == '' then return 'over' end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if held then
  local till, whose = string.match(held, '^(%d+) (.*)$')
  if whose ~= ARGV[2] and tonumber(till) > now then return 'anothers' end
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %s', now + ARGV[3], ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 'yours'
