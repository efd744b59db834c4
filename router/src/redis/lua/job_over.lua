-- Jobs that have been over for long enough. ARGV: a state, up to when they ended, how many.
local found = {}
for _, id in ipairs(call('ZRANGEBYSCORE', IN .. ARGV[1], '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])) do
  local job = load(id)
  if not job then
    call('ZREM', IN .. ARGV[1], id)
  elseif job[STATE] ~= ARGV[1] then
    place(id, job, ARGV[1])
  else
    found[#found + 1] = told(id, job)
  end
end
return found
