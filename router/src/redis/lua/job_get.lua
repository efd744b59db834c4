-- Jobs by their ids. ARGV: ids. Answers those that there are.
local answer = {}
for _, id in ipairs(ARGV) do
  local job = load(id)
  if job then answer[#answer + 1] = told(id, job) end
end
return answer
