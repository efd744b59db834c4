-- Jobs under an event name, in the order of their ids. KEYS[1]: the shard of the name. ARGV: name, from where on and up to where
-- behind the name, how many.
local call = redis.call
local low, high, whom = '(' .. ARGV[1] .. '\0' .. ARGV[2], '(' .. ARGV[1] .. '\0' .. ARGV[3], {}
if ARGV[3] == '' then high = '(' .. ARGV[1] .. '\1' end
for i, member in ipairs(call('ZRANGEBYLEX', KEYS[1] .. ':names', low, high, 'LIMIT', 0, ARGV[4])) do
  whom[i] = string.sub(member, #ARGV[1] + 2)
end
return whom
