-- ARGV: node, length of the lease in milliseconds, record. Known: whether the node had its lease until now.
local name = 'n' .. ARGV[1]
local known = valid(name) and 1 or 0
grant(name, ARGV[1], tonumber(ARGV[2]))
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
