-- Clients of one group of an index in order. KEYS[1]: groups and clients in order.
-- ARGV: group, a client (begin after it; may be empty), how many.
local low, high = '(' .. ARGV[1] .. '\0' .. ARGV[2], '(' .. ARGV[1] .. '\1'
local clients = {}
for i, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], low, high, 'LIMIT', 0, ARGV[3])) do
  clients[i] = string.sub(member, #ARGV[1] + 2)
end
return clients
