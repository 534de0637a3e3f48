// Which regime and which team of threads a call runs in: every rule about sizes and shapes of every
// op in one place.
#include <algorithm>
#include <iterator>

#include "estimators_params.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

namespace {

// Teams that hold a row, smallest first: threads, and the groups of elements that each may hold.
struct TeamSize {
  int threads, groups;
};
constexpr int kMax = 0;  // stands for held_groups()
constexpr int kAny = -1;
constexpr TeamSize kTeams[] = {
    {1, 1},  {2, 1},     {4, 1},      {8, 1},      {32, 1},
    {32, 2}, {32, kMax}, {128, kMax}, {256, kMax}, {480, kMax},
};
constexpr TeamSize kPickTeams[] = {{1, 2}, {2, 2}, {4, 2}, {8, 2}, {32, 8}, {256, kAny}};
// Threads of float64 that may share a multiprocessor at most, for their registers.
constexpr int kMaxFloat64Threads = 256;
// Clusters of small blocks first: two on a multiprocessor, one can compute while the other waits.
constexpr int kClusterThreads[] = {256, 480};

// A block must have this many classes for a second launch to pay.
constexpr std::int64_t kMinChunkClasses = 4096;
// Rows are split among blocks when there are fewer than this part of the multiprocessors.
constexpr int kFewRows = 2;
// Classes up to which it does not pay that warps share columns, whose results they would have to
// merge; and from which more warps do, where columns are few.
constexpr std::int64_t kFewClasses = 48, kManyClasses = 512;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Plan split_row(const Params& p, const Device& device, int group) {
  const std::int64_t rows = p.outer * p.inner;
  // The grid of groups begins up to group - 1 elements before class 0.
  const std::int64_t length = p.classes + group - 1;
  const std::int64_t wanted = divide_up(4 * device.multiprocessors, rows);
  const std::int64_t most = std::max<std::int64_t>(1, length / kMinChunkClasses);
  const std::int64_t chunks = std::min<std::int64_t>({wanted, most, 1024});
  const std::int64_t chunk_classes =
      divide_up(divide_up(length, chunks), 256 * group) * 256 * group;
  return Plan{Regime::kSplit, 256, 0, 1, divide_up(length, chunk_classes), chunk_classes};
}

// Whether every row begins a group of noise positions, or has positions that do not go by groups.
bool rows_begin_groups(const Params& p, int group) {
  if (p.position_class_stride != 1) return true;
  return p.row_positions == nullptr && p.first_position % static_cast<unsigned>(group) == 0 &&
         p.position_outer_stride % group == 0 && p.position_inner_stride % group == 0;
}

// Whether a block a row would leave multiprocessors idle, where a row is long enough to be shared.
bool leaves_idle(const Params& p, const Device& device) {
  return p.outer * p.inner < 2 * device.multiprocessors && p.classes >= 4 * kMinChunkClasses;
}

}  // namespace

Plan make_plan(Op op, ElementType type, const Params& p, const Device& device) {
  const int group = group_elements(type);
  const std::int64_t rows = p.outer * p.inner;
  const bool pick = op == Op::kHard || op == Op::kIndexOnly;
  if (p.class_stride != 1 && p.classes > 1) {
    const std::int64_t blocks = divide_up(p.outer * divide_up(p.inner, 4), 32);
    // In float64, sixteen warps would not have the registers.
    const bool share = p.classes >= kManyClasses && blocks < device.multiprocessors &&
                       type != ElementType::kFloat64;
    return Plan{Regime::kColumns, p.classes < kFewClasses ? 1 : (share ? 16 : 8), 0, 1, 1, 0};
  }
  if (rows * kFewRows <= device.multiprocessors && p.classes >= 4 * kMinChunkClasses) {
    return split_row(p, device, group);
  }
  const std::int64_t lead = rows_begin_groups(p, group) ? 0 : group - 1;
  const std::int64_t groups = divide_up(p.classes + lead, group);
  // A hard sample holds nothing: enough threads that each has a few groups, of which it loads two
  // at once.
  const int most = held_groups(element_bytes(type));
  const TeamSize* begin = pick ? std::begin(kPickTeams) : std::begin(kTeams);
  const TeamSize* end = pick ? std::end(kPickTeams) : std::end(kTeams);
  for (const TeamSize* size = begin; size != end; ++size) {
    const TeamSize team = *size;
    if (type == ElementType::kFloat64 && team.threads > kMaxFloat64Threads) continue;
    const int held = team.groups == kMax ? most : team.groups;
    if (groups > static_cast<std::int64_t>(team.threads) * held && team.groups != kAny) continue;
    if (team.groups == kAny && leaves_idle(p, device)) return split_row(p, device, group);
    Plan plan{Regime::kRows, team.threads, pick ? (groups > team.threads ? 2 : 1) : held, 1, 1, 0};
    if (team.threads <= 32) {
      // Short rows spend much of their time on getting started: once for several rows, as long as
      // that leaves no multiprocessor idle.
      const std::int64_t blocks = divide_up(rows * team.threads, 128);
      plan.repeats =
          static_cast<int>(std::clamp<std::int64_t>(blocks / (16 * device.multiprocessors), 1, 8));
    }
    return plan;
  }
  if (device.clusters) {
    for (const int threads : kClusterThreads) {
      if (type == ElementType::kFloat64 && threads > kMaxFloat64Threads) continue;
      for (int cluster = 2; cluster <= 16; cluster *= 2) {
        if (groups <= static_cast<std::int64_t>(cluster) * threads * most) {
          return Plan{Regime::kClusters, threads, most, cluster, 1, 0};
        }
      }
    }
  }
  if (leaves_idle(p, device)) return split_row(p, device, group);
  return Plan{Regime::kStream, 256, 0, 1, 1, divide_up(p.classes + group, group) * group};
}

TopKPlan make_topk_plan(ElementType type, const Params& p, const Device& device) {
  // A round a class takes about as long as a pass of a sort from here on.
  constexpr std::int64_t kMaxRounds = 64;
  const std::int64_t rows = p.outer * p.inner, group = group_elements(type);
  const std::int64_t score_bytes = type == ElementType::kFloat64 ? 8 : 4;
  const std::int64_t groups = divide_up(p.classes + group - 1, group);
  TopKPlan plan{p.k > kMaxRounds, 256, 1, groups * group, 0};
  if (!plan.sorts && groups <= 256) plan.team = groups <= 16 ? 8 : 32;
  const std::int64_t rows_of_block = plan.team == 256 ? 1 : 128 / plan.team;
  // Scores of rows that are being worked on, not of all rows.
  const std::int64_t most = (plan.team == 256 ? 2 : 8) * device.multiprocessors;
  plan.blocks = static_cast<int>(
      std::clamp<std::int64_t>(divide_up(rows, rows_of_block), 1, plan.sorts ? 1 << 30 : most));
  plan.bytes =
      (plan.sorts ? rows * p.classes : plan.blocks * rows_of_block * plan.slot) * score_bytes;
  return plan;
}

int row_team(std::int64_t classes) {
  if (classes <= 4 * kRowGroup) return 4;
  return classes <= 1024 ? 32 : 256;
}

namespace {

// The smallest team whose threads hold a row of so many classes, up to `most` threads.
HeldRowPlan held_row(ElementType type, std::int64_t classes, int most) {
  const int groups = held_row_groups(type);
  for (const int team : {4, 32, 256}) {
    // In float64, parts of a warp gain nothing.
    if (team == 4 && type == ElementType::kFloat64) continue;
    if (team <= most && classes <= std::int64_t{team} * groups * kRowGroup) return {team, groups};
  }
  return {256, 0};
}

}  // namespace

HeldRowPlan make_estimator_plan(ElementType type, std::int64_t classes) {
  // Blocks that hold rows of float64 would not have the registers.
  return held_row(type, classes, type == ElementType::kFloat64 ? 32 : 256);
}
HeldRowPlan make_gumbel_rao_plan(ElementType type, std::int64_t classes) {
  return held_row(type, classes, 256);
}

PositionGrid merged_positions(std::uint64_t first, int dims, const std::int64_t* size,
                              const std::int64_t* stride) {
  PositionGrid grid{};
  grid.first = first;
  grid.dims = 0;
  for (int d = 0; d < dims; ++d) {
    if (size[d] == 1) continue;
    const int last = grid.dims - 1;
    if (last >= 0 && grid.stride[last] == size[d] * stride[d]) {
      grid.size[last] *= size[d];
      grid.stride[last] = stride[d];
    } else {
      grid.size[grid.dims] = size[d];
      grid.stride[grid.dims++] = stride[d];
    }
  }
  return grid;
}

bool set_positions(Params& p, std::uint64_t first, int dims, const std::int64_t* size,
                   const std::int64_t* stride, int dim, PositionGrid* rows) {
  std::int64_t row_size[kMaxDims] = {}, row_stride[kMaxDims] = {};
  int row_dims = 0;
  for (int d = 0; d < dims; ++d) {
    if (d == dim) continue;
    row_size[row_dims] = size[d];
    row_stride[row_dims++] = stride[d];
  }
  const int outer_dims = dims == 0 ? 0 : dim;
  const PositionGrid outer = merged_positions(first, outer_dims, row_size, row_stride);
  const PositionGrid inner =
      merged_positions(0, row_dims - outer_dims, row_size + outer_dims, row_stride + outer_dims);
  p.first_position = first;
  p.position_outer_stride = outer.dims == 0 ? 0 : outer.stride[0];
  p.position_class_stride = dims == 0 || size[dim] == 1 ? 1 : stride[dim];
  p.position_inner_stride = inner.dims == 0 ? 0 : inner.stride[0];
  p.row_positions = nullptr;
  if (outer.dims <= 1 && inner.dims <= 1) return false;
  *rows = merged_positions(first, row_dims, row_size, row_stride);
  return true;
}

void set_no_noise(Params& p) {
  p.first_position = 0;
  p.position_outer_stride = p.position_inner_stride = 0;
  p.position_class_stride = kNoNoise;
  p.row_positions = nullptr;
}

std::int64_t partial_bytes(const Plan& plan, const Params& p) {
  // Three numbers of 8 bytes are the most that a chunk leaves.
  return plan.regime == Regime::kSplit ? p.outer * p.inner * plan.chunks * 24 : 0;
}

}  // namespace cuda
}  // namespace gumbel_ext
