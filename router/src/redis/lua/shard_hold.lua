-- ARGV: shard, node, length of the lease in milliseconds. 1 if the node has the shard now.
local name = 's' .. ARGV[1]
if valid(name) and leases[name].holder ~= ARGV[2] then
  return 0
end
grant(name, ARGV[2], tonumber(ARGV[3]))
return 1
