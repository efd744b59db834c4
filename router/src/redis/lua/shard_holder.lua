-- ARGV: shard. Its holder, or nil.
return valid('s' .. ARGV[1]) and leases['s' .. ARGV[1]].holder or false
