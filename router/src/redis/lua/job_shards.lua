-- Behind leases.lua. ARGV: who takes part, length of its leases in ms (0: it leaves), how many shards there are.
-- Renews it and its shards, gives up what is beyond its share, takes what is free up to that. Answers what it has.
local me, length, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if length == 0 then
  for name, lease in pairs(leases) do
    if lease.holder == me then forget(name) end
  end
  return {}
end
grant('n' .. me, me, length)
local members = {}
for name in pairs(leases) do
  if string.sub(name, 1, 1) == 'n' and valid(name) then members[#members + 1] = name end
end
table.sort(members)
local share = math.floor(count / #members)
for at, name in ipairs(members) do
  if name == 'n' .. me and at <= count % #members then share = share + 1 end
end
local mine = {}
local function visit(wanted)
  for shard = 0, count - 1 do
    local name = 's' .. shard
    local holder = valid(name) and leases[name].holder or nil
    if holder == wanted and #mine < share then
      grant(name, me, length)
      mine[#mine + 1] = shard
    elseif holder == me and wanted == me then
      forget(name)
    end
  end
end
visit(me)
visit(nil)
return mine
