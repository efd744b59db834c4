-- Changes a job that has not begun. ARGV: id, when it fires (empty: as before), plan (empty: as before), actions of the plan, the plan
-- until now (empty: whatever it is).
-- Answers 'done' or 'refused' and the job; 'again' where it has another plan meanwhile; nothing where there is none.
local id, job = ARGV[1], load(ARGV[1])
if not job then return {} end
if job[STATE] ~= 'p' then return { 'refused', told(id, job) } end
if ARGV[3] ~= '' or ARGV[5] ~= '' then
  local body = call('HGET', BODY, id) or '\0\0\0\0'
  local fixed = 4 + struct.unpack('>I4', body)
  local plan = string.sub(body, fixed + 1)
  if ARGV[5] ~= '' and plan ~= ARGV[5] and plan ~= ARGV[3] then return { 'again' } end
  if ARGV[3] ~= '' then
    call('HSET', BODY, id, string.sub(body, 1, fixed) .. ARGV[3])
    job[ACTIONS] = ARGV[4]
  end
end
if ARGV[2] ~= '' then job[AT], job[DUE], job[BY] = tonumber(ARGV[2]), 0, '' end
change(id, job, 'p')
return { 'done', told(id, job) }
