-- ARGV: shard, node.
local name = 's' .. ARGV[1]
if leases[name] and leases[name].holder == ARGV[2] then
  forget(name)
end
return 1
