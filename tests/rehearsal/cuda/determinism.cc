// What CUDA refuses when deterministic algorithms are asked for. The names are those that libtorch_cuda.so 2.11 gives to, most
// of them as its machine code does, to `alertNotDeterministic`; that of `put_` is in libtorch_cpu.so. Notable: 2.11's cumsum,
// index_add and scatter_add have deterministic forms, and matrix products no longer ask for CUBLAS_WORKSPACE_CONFIG.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <unordered_map>

#include "operands.h"

namespace stand_in {
namespace {

// By the operator's name without "aten::" and overload.
const auto& kAlerts = *new std::unordered_map<std::string, std::string>{
    {"_adaptive_avg_pool2d_backward", "adaptive_avg_pool2d_backward_cuda"},
    {"_adaptive_avg_pool3d_backward", "adaptive_avg_pool3d_backward_cuda"},
    {"adaptive_max_pool2d_backward", "adaptive_max_pool2d_backward_cuda"},
    {"avg_pool3d_backward", "avg_pool3d_backward_cuda"},
    {"max_pool3d_with_indices_backward", "max_pool3d_with_indices_backward_cuda"},
    {"fractional_max_pool2d_backward", "fractional_max_pool2d_backward_cuda"},
    {"fractional_max_pool3d_backward", "fractional_max_pool3d_backward_cuda"},
    {"grid_sampler_2d_backward", "grid_sampler_2d_backward_cuda"},
    {"grid_sampler_3d_backward", "grid_sampler_3d_backward_cuda"},
    {"index_reduce", "index_reduce_cuda"},
    {"index_reduce_", "index_reduce_cuda"},
    {"_ctc_loss_backward", "ctc_loss_backward_gpu"},
    {"max_unpool2d", "max_unpooling2d_forward_out"},
    {"max_unpool3d", "max_unpooling3d_forward_out"},
    {"nll_loss2d_forward", "nll_loss2d_forward_out_cuda_template"},
    {"reflection_pad1d_backward", "reflection_pad1d_backward_out_cuda"},
    {"reflection_pad2d_backward", "reflection_pad2d_backward_cuda"},
    {"reflection_pad3d_backward", "reflection_pad3d_backward_out_cuda"},
    {"replication_pad1d_backward", "replication_pad1d_backward_cuda"},
    {"replication_pad2d_backward", "replication_pad2d_backward_cuda"},
    {"replication_pad3d_backward", "replication_pad3d_backward_cuda"},
    {"upsample_linear1d_backward", "upsample_linear1d_backward_out_cuda"},
    {"upsample_bilinear2d_backward", "upsample_bilinear2d_backward_out_cuda"},
    {"_upsample_bilinear2d_aa_backward", "upsample_bilinear2d_aa_backward_out_cuda"},
    {"upsample_bicubic2d_backward", "upsample_bicubic2d_backward_out_cuda"},
    {"_upsample_bicubic2d_aa_backward", "upsample_bicubic2d_aa_backward_out_cuda"},
    {"upsample_trilinear3d_backward", "upsample_trilinear3d_backward_out_cuda"},
    {"put_", "put_"},
};

// Those that depend on their arguments.
const char* alert_for(const std::string& name, const torch::jit::Stack& stack, size_t begin) {
  if (name == "aten::median.dim" || name == "aten::median.dim_values" || name == "aten::nanmedian.dim" ||
      name == "aten::nanmedian.dim_values")
    return "median CUDA with indices output";
  if (name.rfind("aten::histc", 0) == 0 && stack[begin].toTensor().is_floating_point())
    return "_histc_cuda with floating point input";
  if (name.rfind("aten::bincount", 0) == 0 && stack[begin + 1].isTensor() && stack[begin + 1].toTensor().defined())
    return "_bincount_cuda";
  if (name.find("scatter") != std::string::npos) {
    const bool by_two = name.find("scatter_reduce") != std::string::npos;
    if (by_two && stack[begin + 4].toStringView() == "prod") return "scatter_reduce_cuda_prod_";
    if (!by_two && name.find(".reduce") != std::string::npos) return "scatter_reduce_cuda_kernel";
  }
  constexpr int64_t kMax = 2;
  if (name.rfind("aten::_embedding_bag_dense_backward", 0) == 0 && stack[begin + 7].toInt() == kMax)
    return "embedding_bag_backward_cuda_max";
  return nullptr;
}

}  // namespace

void check_determinism(const std::string& name, const torch::jit::Stack& stack, size_t begin) {
  if (!at::globalContext().deterministicAlgorithms()) return;
  const size_t from = sizeof "aten::" - 1;
  auto found = kAlerts.find(name.substr(std::min(from, name.size()), name.find('.') - from));
  const char* alert = found != kAlerts.end() ? found->second.c_str() : alert_for(name, stack, begin);
  if (alert) at::globalContext().alertNotDeterministic(alert);
}

}  // namespace stand_in
