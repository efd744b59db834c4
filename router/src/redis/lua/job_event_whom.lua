-- Jobs under an event name, in the order of their ids. ARGV: name, from where on and up to where
-- behind the name, how many.
local low, high, whom = '(' .. ARGV[1] .. '\0' .. ARGV[2], '(' .. ARGV[1] .. '\0' .. ARGV[3], {}
if ARGV[3] == '' then high = '(' .. ARGV[1] .. '\1' end
for i, member in ipairs(call('ZRANGEBYLEX', NAMES, low, high, 'LIMIT', 0, ARGV[4])) do
  whom[i] = string.sub(member, #ARGV[1] + 2)
end
return whom
